"""What benchmarks/pipeline_cpu.py compares: cases, and the pipelines that run them."""
