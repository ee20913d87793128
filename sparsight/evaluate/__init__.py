"""How good a model is, and the page that says so: answers, scores, agreement, speed, report. Trains nothing."""
