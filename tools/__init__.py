"""What works on trained checkpoints and recorded runs, and the console command."""
