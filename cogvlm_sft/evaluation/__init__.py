"""Scoring a checkpoint: metrics, tasks, batched generation, and the run over a build."""
