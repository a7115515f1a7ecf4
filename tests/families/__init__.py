"""Each family from a whole pipeline of diffusers: built, drawn from prompts, and compared with that pipeline."""
