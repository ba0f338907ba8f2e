package loader

// APIVersion returns the version of the API that the plugin was built for, 1 or 2.
func (p *Plugin) APIVersion() int { return int(p.raw.APIVersion) }

// StructSize returns the size of struct nbdkit_plugin in bytes as the plugin has it.
func (p *Plugin) StructSize() uint64 { return p.raw.StructSize }
