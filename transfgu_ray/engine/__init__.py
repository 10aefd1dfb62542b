"""Ray at arm's length: sessions, streams of units, tables of parts, trainers, progress, the watchdog."""
