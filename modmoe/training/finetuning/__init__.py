"""Fine-tuning: what is trained, on which schedule, against which teacher."""
