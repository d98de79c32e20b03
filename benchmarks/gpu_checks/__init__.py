"""The parts of gpu_check.py: what is checked, how, and the report."""
