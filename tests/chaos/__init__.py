"""Runs that are killed at any moment, and disks that lose their power, again and again."""
