"""The mathematics of a run: schedule, solvers, noise and the loop."""
