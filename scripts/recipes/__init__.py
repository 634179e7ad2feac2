"""Recipes shipped with the toolkit, as package data (`xmc.recipes`)."""
