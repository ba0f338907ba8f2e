# A disk of 64 MiB in memory.
use strict;

my $disk = "\0" x 67108864;

sub open { return {}; }
sub get_size { return length $disk; }
sub can_write { return 1; }

sub pread
{
    my ($h, $count, $offset, $flags) = @_;
    return substr ($disk, $offset, $count);
}

sub pwrite
{
    my ($h, $buf, $offset, $flags) = @_;
    substr ($disk, $offset, length $buf, $buf);
}
