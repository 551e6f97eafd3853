"""Outer loops: one engine, one small file per algorithm."""
