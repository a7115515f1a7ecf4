"""Side-by-side benchmarks: one step and one picture by us, and by what people would use instead."""
