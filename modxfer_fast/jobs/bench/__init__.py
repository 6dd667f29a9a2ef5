"""`modxfer bench`: the benchmarks of a checkout, found and run. Needs torch only."""
