"""Devices and processes: the mapped axis, several processes as one run, and interrupts."""
