"""What several tests need: blocks and bounds, commands, models, servers, programs that are killed."""
