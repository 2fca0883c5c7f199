"""The cases of `pyfused bench`: one file an operator, a model or a question. Seen as pyfused.bench.benchmarks."""
