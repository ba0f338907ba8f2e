package protocol

// Command is the type of a transmission request ("Request types").
type Command uint16

// The requests of the transmission phase.
const (
	CmdRead        Command = 0
	CmdWrite       Command = 1
	CmdDisc        Command = 2
	CmdFlush       Command = 3
	CmdTrim        Command = 4
	CmdCache       Command = 5
	CmdWriteZeroes Command = 6
	CmdBlockStatus Command = 7
)

// String gives the specification's name, such as NBD_CMD_READ.
func (c Command) String() string {
	if spec, ok := Lookup(c); ok {
		return spec.Name
	}
	return valueName(c, nil, "NBD_CMD")
}

// CommandFlags modify a request ("Command flags").
type CommandFlags uint16

// Command flags.
const (
	CmdFlagFUA        CommandFlags = 1 << 0
	CmdFlagNoHole     CommandFlags = 1 << 1
	CmdFlagDF         CommandFlags = 1 << 2
	CmdFlagReqOne     CommandFlags = 1 << 3
	CmdFlagFastZero   CommandFlags = 1 << 4
	CmdFlagPayloadLen CommandFlags = 1 << 5
)

var commandFlagNames = []string{
	"NBD_CMD_FLAG_FUA", "NBD_CMD_FLAG_NO_HOLE", "NBD_CMD_FLAG_DF",
	"NBD_CMD_FLAG_REQ_ONE", "NBD_CMD_FLAG_FAST_ZERO", "NBD_CMD_FLAG_PAYLOAD_LEN",
}

// String gives the specification's names, joined by "|", or "0".
func (f CommandFlags) String() string { return flagNames(uint64(f), commandFlagNames) }

// Spec is what is fixed about a command.
type Spec struct {
	Name    string       // as the specification spells it
	Flags   CommandFlags // the flags that it may carry
	Payload bool         // a request is followed by Length bytes of data
	Data    bool         // a reply carries up to Length bytes of data
	Writes  bool         // refused on a read-only export
	Range   bool         // Offset and Length must lie within the export
	Needs   ExportFlags  // the server must have advertised these
}

// Commands is the one table of commands, indexed by Command.
var Commands = [...]Spec{
	CmdRead:        {Name: "NBD_CMD_READ", Flags: CmdFlagFUA | CmdFlagDF, Data: true, Range: true},
	CmdWrite:       {Name: "NBD_CMD_WRITE", Flags: CmdFlagFUA | CmdFlagPayloadLen, Payload: true, Writes: true, Range: true},
	CmdDisc:        {Name: "NBD_CMD_DISC"},
	CmdFlush:       {Name: "NBD_CMD_FLUSH", Flags: CmdFlagFUA, Needs: FlagSendFlush},
	CmdTrim:        {Name: "NBD_CMD_TRIM", Flags: CmdFlagFUA, Writes: true, Range: true, Needs: FlagSendTrim},
	CmdCache:       {Name: "NBD_CMD_CACHE", Flags: CmdFlagFUA, Range: true, Needs: FlagSendCache},
	CmdWriteZeroes: {Name: "NBD_CMD_WRITE_ZEROES", Flags: CmdFlagFUA | CmdFlagNoHole | CmdFlagFastZero, Writes: true, Range: true, Needs: FlagSendWriteZeroes},
	CmdBlockStatus: {Name: "NBD_CMD_BLOCK_STATUS", Flags: CmdFlagFUA | CmdFlagReqOne | CmdFlagPayloadLen, Range: true},
}

// Lookup finds a command in the table. An unknown one gives false.
func Lookup(c Command) (*Spec, bool) {
	if int(c) >= len(Commands) {
		return nil, false
	}
	return &Commands[c], true
}
