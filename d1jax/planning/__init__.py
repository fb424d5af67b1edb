"""What a run will take before it is started: its programs from shapes alone, their memory, their work, and what makes them fit."""
