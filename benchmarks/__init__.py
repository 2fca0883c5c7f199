"""Benchmarks of every operator and model beside their peers; `python -m benchmarks` runs them."""
