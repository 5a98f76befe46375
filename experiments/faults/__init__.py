"""What `experiments.fault_suite` does to a deployment that runs: faults, a clock that jumps, a disk that fills, strangers."""
