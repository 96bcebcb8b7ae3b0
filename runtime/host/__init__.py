"""What this machine is: processor, memory, home folder, clock, forks, file locks, onnxruntime."""
