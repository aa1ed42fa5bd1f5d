"""Schedules as data: an action, and the order of actions on every rank."""
