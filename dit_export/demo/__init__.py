"""The small model that ships with the project: its data set, its training and its score."""
