"""Extreme multi-label classification with sparse output layers."""
