/* A plugin of QEMU that prints the number of instructions executed so far, whenever the program makes a mark.
 *
 * The mark is getsid, a system call of 64-bit Arm that nothing else makes here. Counting by blocks of translated code
 * costs next to nothing, where a call for each instruction makes programs twenty times slower.
 */

#include <inttypes.h>
#include <stdio.h>

#include <qemu-plugin.h>

#define MARK 156

QEMU_PLUGIN_EXPORT int qemu_plugin_version = QEMU_PLUGIN_VERSION;

static qemu_plugin_u64 executed;

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *block)
{
    qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(block, QEMU_PLUGIN_INLINE_ADD_U64, executed,
                                                      qemu_plugin_tb_n_insns(block));
}

static void called(qemu_plugin_id_t id, unsigned int cpu, int64_t number, uint64_t a, uint64_t b, uint64_t c,
                   uint64_t d, uint64_t e, uint64_t f, uint64_t g, uint64_t h)
{
    if (number == MARK)
        fprintf(stderr, "executed: %" PRIu64 "\n", qemu_plugin_u64_sum(executed));
}

QEMU_PLUGIN_EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
    executed = qemu_plugin_scoreboard_u64(qemu_plugin_scoreboard_new(sizeof(uint64_t)));
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_vcpu_syscall_cb(id, called);
    return 0;
}
