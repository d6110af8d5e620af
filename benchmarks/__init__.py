"""`python -m benchmarks NAME`: timings of this package, printed as JSON; see README.md."""
