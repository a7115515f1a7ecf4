"""What a picture is drawn from: arrays by port, and what the stages before the loop make of them, once per key."""
