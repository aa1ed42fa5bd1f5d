"""What benchmarks/zero_cpu.py compares."""
