"""Datasets: sources, preparation, reading, order, and what lies between their items and what networks see."""
