"""Objective, schedule and trainer."""
