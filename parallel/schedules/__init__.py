"""Schedules: functions ``(layout, mask, ...) -> Plan``, one idea a file."""
