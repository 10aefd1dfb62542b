"""Everything that touches Ray: sessions, streams of units, tables of parts, trainers, progress, the watchdog."""
