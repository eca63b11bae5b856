"""Whole-image prediction, metrics, tables and figures."""
