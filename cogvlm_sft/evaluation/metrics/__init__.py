"""Scores of answers: pure functions of text and numbers, each equal to an official scorer."""
