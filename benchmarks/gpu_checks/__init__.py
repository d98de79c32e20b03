"""The parts of gpu_check.py: families, checks, timing, sanitizer and report."""
