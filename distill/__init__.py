"""Knowledge distillation: train a small student from a big teacher, measure the trade-off, export the student."""
