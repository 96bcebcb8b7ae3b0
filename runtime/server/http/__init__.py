"""The parts of HTTP that know no model: errors on the wire, reading bodies, who may call, streams."""
