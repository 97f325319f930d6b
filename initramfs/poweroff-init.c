// The smallest init there is: it ends the VM at once. It is the floor that start-up times are
// compared with, and the probe of the kernel profile. No libc; no other use belongs here.
//
// Arguments (the kernel passes what follows `--` on its command line):
//   off      power off through the platform (ACPI); the default is a restart, which QEMU's
//            -no-reboot turns into its end
//   kmsg     first write the kernel's log to the console
//   tsc      first write the time stamp counter to the console, in decimal
//   stay     say so on the console and stay
//   panic    end by exiting, which makes the kernel panic
#define SYS_write 1
#define SYS_pause 34
#define SYS_exit 60
#define SYS_syslog 103
#define SYS_reboot 169
#define SYSLOG_ACTION_READ_ALL 3
#define MAGIC1 0xfee1deadL
#define MAGIC2 672274793L
#define RESTART 0x1234567L
#define POWER_OFF 0x4321fedcL

static long call(long n, long a, long b, long c, long d)
{
	long r;
	register long r10 __asm__("r10") = d;
	__asm__ volatile("syscall"
			 : "=a"(r)
			 : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10)
			 : "rcx", "r11", "memory");
	return r;
}

static int same(const char *a, const char *b)
{
	for (; *a && *a == *b; a++, b++)
		;
	return *a == *b;
}

static void write_all(const char *p, long n)
{
	while (n > 0) {
		long done = call(SYS_write, 1, (long)p, n, 0);
		if (done <= 0)
			return;
		p += done;
		n -= done;
	}
}

static void write_tsc(void)
{
	unsigned low, high;
	char text[32];
	char *p = text + sizeof text;
	__asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
	unsigned long v = (unsigned long)high << 32 | low;
	*--p = '\n';
	do
		*--p = '0' + v % 10;
	while (v /= 10);
	const char name[] = "init tsc ";
	write_all(name, sizeof name - 1);
	write_all(p, text + sizeof text - p);
}

static char log_text[1 << 20];

// `stack` is what the kernel leaves at the process's entry: argc, argv[], NULL, ...
__attribute__((used)) static void run(long *stack)
{
	long how = RESTART;
	char **argv = (char **)(stack + 1);
	for (long i = 1; i < stack[0]; i++) {
		if (same(argv[i], "off"))
			how = POWER_OFF;
		else if (same(argv[i], "tsc"))
			write_tsc();
		else if (same(argv[i], "kmsg"))
			write_all(log_text, call(SYS_syslog, SYSLOG_ACTION_READ_ALL,
						 (long)log_text, sizeof log_text, 0));
		else if (same(argv[i], "stay")) {
			static const char stays[] = "init stays\n";
			write_all(stays, sizeof stays - 1);
			for (;;)
				call(SYS_pause, 0, 0, 0, 0);
		} else if (same(argv[i], "panic"))
			call(SYS_exit, 0, 0, 0, 0);
	}
	call(SYS_reboot, MAGIC1, MAGIC2, how, 0);
	call(SYS_exit, 1, 0, 0, 0);
}

__asm__(".globl _start\n_start:\n\tmov %rsp, %rdi\n\tand $-16, %rsp\n\tcall run\n");
