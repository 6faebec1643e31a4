"""What training the SMP at the paper's scale takes, counted."""
