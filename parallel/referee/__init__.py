"""Any layout against one device, parameter by parameter."""
