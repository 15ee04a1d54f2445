"""Labels of recorded sessions, beside making them: what a person says about doubtful events."""
