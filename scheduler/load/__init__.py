"""Under load: how much of which work fits (levels, solver, estimator), and which prompt gets which level (shift)."""
