"""Programs that the image build compiles or runs inside the built root. No module imports them."""
