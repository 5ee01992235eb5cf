"""Long-running work: run folders, cached results, atomic files, signals, process pools, Ray, ranks."""
