"""INT8 denoisers: activations seen along real trajectories, smoothing folded for free, Q/DQ on the layers."""
