"""A PEFT folder becomes checked values, with numpy alone."""
