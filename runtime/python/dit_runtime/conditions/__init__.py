"""Conditions, arrays by port that a sample is drawn from, and memos of what the stages before the loop make of them."""
