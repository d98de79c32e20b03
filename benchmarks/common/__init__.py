"""Code that several benchmarks share: cases, timing, reports and baselines."""
