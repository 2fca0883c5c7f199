"""What does `pyfused bench` measure? One file for each operator, model or question, imported as pyfused.bench.benchmarks."""
