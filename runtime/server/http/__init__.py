"""The parts of the server that know no model: error responses, reading bodies, access control, streams."""
