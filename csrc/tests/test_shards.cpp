// The row operators for shards at every instruction-set level this processor has: rows in parts,
// the three phases with a merge in double between them, against the definitions in long double. The
// sanitizers see that no shard reads or writes beyond its columns.
#include <cstdio>
#include <vector>

#include "cpu/cpu.h"
#include "tests/kept_rows.h"

namespace {

using kdk::DistillArgs;
using kdk::Divergence;
using kdk::DType;
using kdk::KeptShardStatistics;
using kdk::Objective;
using kdk::Phase;
using kdk::ShardArgs;
using kdk::ShardStatistics;
using kdk::test::kept_reference;
using kdk::test::KeptErrors;
using kdk::test::KeptTeacher;
using kdk::test::kIgnore;
using kdk::test::Logits;
using kdk::test::raise;
using kdk::test::Reference;

using Operator = void (*)(Phase, const ShardArgs&, int);

// In this order: a label in the first shard; ignored; one in the last; one that the student is sure
// of.
enum { kFirst, kIgnored, kLast, kSure, kRows };

struct Case {
  DType student;
  std::vector<std::int64_t> widths;
  std::int64_t kept;  // K; 0: a dense teacher
  Divergence divergence;
  double temperature, label_smoothing, scale, cap;
};

// What a device has.
struct Shard {
  Logits student, teacher;
  KeptTeacher kept;
  std::vector<std::int64_t> labels;
  std::vector<double> found, terms;
  std::vector<float> unscale;
  ShardArgs args;

  Shard(const Case& which, std::int64_t width)
      : student(which.student, kRows, width + 2),
        teacher(DType::kFloat32, kRows, width),
        kept(kRows, which.kept),
        unscale(kRows),
        args{} {}
};

double drop(double max, double highest) {
  return max == -static_cast<double>(kdk::kInfinity) ? max : max - highest;
}

// Fields (·, kRows) of whole rows from those of shards, which are (·, kRows) too.
struct Merge {
  const std::vector<Shard>& shards;
  std::size_t row;
  double temperature;

  double at(const Shard& shard, std::size_t field) const {
    return shard.found[field * kRows + row];
  }

  double highest(std::size_t field) const {
    double max = -kdk::kInfinity;
    for (const Shard& shard : shards) max = std::fmax(max, at(shard, field));
    return max;
  }

  // Of Σ e^{(x − max)/T}.
  double sum(std::size_t field, std::size_t max, double at_temperature) const {
    double total = 0;
    for (const Shard& shard : shards) {
      total += at(shard, field) * std::exp(drop(at(shard, max), highest(max)) / at_temperature);
    }
    return total;
  }
};

// Of a row; the divergence when that is the forward KL.
struct Losses {
  double kl, hard;
};

double cross_entropy(double rest, double x_label, double offset, double columns, double smoothing) {
  const double log_z = std::log(rest + std::exp(x_label));
  const double loss = x_label == 0 ? std::log1p(rest) : log_z - x_label;
  return (1 - smoothing) * loss + smoothing * (log_z - offset / columns);
}

double merged_offset(const Merge& merge, std::size_t offset, std::size_t max) {
  double total = 0;
  for (const Shard& shard : merge.shards) {
    const auto columns = static_cast<double>(shard.args.rows.objective.vocab_size);
    total += merge.at(shard, offset) + columns * (merge.at(shard, max) - merge.highest(max));
  }
  return total;
}

Losses merge_dense(const Merge& m, double columns, double smoothing, ShardStatistics& all) {
  enum { kMaxS, kZS, kZRest, kLabel, kOffset, kMaxT, kZT, kLogRatio, kKL };
  const double T = m.temperature;
  all = {m.highest(kMaxS),
         m.sum(kZS, kMaxS, T),
         m.sum(kZRest, kMaxS, 1),
         m.highest(kLabel),
         merged_offset(m, kOffset, kMaxS),
         m.highest(kMaxT),
         m.sum(kZT, kMaxT, T),
         0,
         0};
  all.log_ratio = std::log(all.z_s / all.z_t);
  for (const Shard& shard : m.shards) {
    const double p = m.at(shard, kZT) * std::exp((m.at(shard, kMaxT) - all.max_t) / T) / all.z_t;
    const double q = m.at(shard, kZS) * std::exp((m.at(shard, kMaxS) - all.max_s) / T) / all.z_s;
    all.kl += p * (m.at(shard, kKL) + std::log(p / q));
    CHECK(std::fabs(m.at(shard, kLogRatio) - std::log(m.at(shard, kZS) / m.at(shard, kZT))) < 1e-6);
  }
  const double x_label = all.label - all.max_s;
  return {all.kl, cross_entropy(all.z_rest, x_label, all.offset, columns, smoothing)};
}

Losses merge_kept(const Merge& m, double columns, double smoothing, double log_rest,
                  KeptShardStatistics& all) {
  enum {
    kOthers,
    kZ,
    kZHard,
    kLabel,
    kOffset,
    kHighest,
    kKeptZ,
    kKeptZHard,
    kShare,
    kCross,
    kApart
  };
  const double T = m.temperature;
  all = {m.highest(kOthers),
         m.sum(kZ, kOthers, T),
         m.sum(kZHard, kOthers, 1),
         m.highest(kLabel),
         merged_offset(m, kOffset, kHighest),
         m.highest(kHighest),
         m.sum(kKeptZ, kHighest, T),
         m.sum(kKeptZHard, kHighest, 1),
         0,
         0,
         m.highest(kApart)};
  for (const Shard& shard : m.shards) {
    const double below = (m.at(shard, kHighest) - all.highest) / T;
    all.share += m.at(shard, kShare);
    all.cross += m.at(shard, kCross) - m.at(shard, kShare) * below;
  }
  const double x_label = all.label - all.highest, others = drop(all.others, all.highest);
  double rest = all.z * std::exp(others / T);
  if (all.apart != 0) rest += std::exp(x_label / T);
  const double z = rest + all.kept_z, p_rest = std::exp(log_rest);
  Losses losses{all.cross + all.share * std::log(z), 0};
  if (p_rest > 0) losses.kl += p_rest * (log_rest - std::log(rest / z));
  const double hard_rest = all.kept_z_hard + all.z_hard * std::exp(others);
  losses.hard = cross_entropy(hard_rest, x_label, all.offset, columns, smoothing);
  return losses;
}

template <typename Fields>
void scatter(const Fields& fields, std::size_t row, std::vector<double>& merged) {
  const auto* values = reinterpret_cast<const double*>(&fields);
  for (std::size_t i = 0; i < sizeof fields / sizeof(double); ++i) {
    merged[i * kRows + row] = values[i];
  }
}

void test(Operator run, const Case& which, KeptErrors& errors) {
  std::int64_t columns = 0;
  for (std::int64_t width : which.widths) columns += width;
  std::mt19937 random(static_cast<unsigned>(columns + which.kept));
  std::normal_distribution<float> normal(0, 3);
  Logits student(which.student, kRows, columns), teacher(DType::kFloat32, kRows, columns);
  const bool dense = which.kept == 0;
  KeptTeacher known(kRows, dense ? columns : which.kept);
  const std::int64_t labels[kRows] = {0, kIgnore, columns - 1, columns / 2};
  std::vector<std::int64_t> all(static_cast<std::size_t>(columns));
  std::iota(all.begin(), all.end(), 0);
  for (std::int64_t row = 0; row < kRows; ++row) {
    for (std::int64_t j = 0; j < columns; ++j) {
      teacher.set(row, j, normal(random));
      student.set(row, j, teacher.get(row, j) + normal(random) / 2);
    }
    if (row == kSure) student.set(row, labels[row], which.cap != 0 ? 25 / which.scale : 25);
    std::vector<std::int64_t> some;
    std::sample(all.begin(), all.end(), std::back_inserter(some), known.count, random);
    known.set(static_cast<std::size_t>(row), some,
              kdk::test::softmax(teacher, row, columns, which.temperature), false);
  }

  Objective objective{};
  objective.divergence = which.divergence;
  objective.beta = 0.3;
  objective.temperature = which.temperature;
  objective.distill_weight = 0.5;
  objective.hard_weight = 0.4;
  objective.label_smoothing = which.label_smoothing;
  objective.student_scale = which.scale;
  objective.student_cap = which.cap;
  objective.ignore_index = kIgnore;
  objective.vocab_size = columns;
  std::vector<Reference> want;
  for (std::int64_t row = 0; row < kRows; ++row) {
    want.push_back(kept_reference(student, known, row, labels[row], objective));
  }

  std::vector<Shard> shards;
  for (std::int64_t width : which.widths) shards.emplace_back(which, width);
  const std::size_t fields =
      (dense ? sizeof(ShardStatistics) : sizeof(KeptShardStatistics)) / sizeof(double);
  std::vector<double> merged((fields + 1) * kRows);
  std::int64_t first = 0;
  for (Shard& shard : shards) {
    const std::int64_t width = shard.teacher.width;
    for (std::int64_t row = 0; row < kRows; ++row) {
      const bool ignored = row == kIgnored;
      for (std::int64_t j = 0; j < width; ++j) {
        shard.student.set(row, j, ignored ? kdk::kNaN : student.get(row, first + j));
        shard.teacher.set(row, j, teacher.get(row, first + j));
      }
      for (std::int64_t j = width; j < width + 2; ++j) shard.student.set(row, j, kdk::kNaN);
      const std::int64_t label = labels[row] - first;
      shard.labels.push_back(ignored                       ? kIgnore
                             : label >= 0 && label < width ? label
                                                           : kdk::kElsewhere);
      auto at = static_cast<std::size_t>(row * which.kept);
      shard.kept.log_rest[static_cast<std::size_t>(row)] =
          known.log_rest[static_cast<std::size_t>(row)];
      const std::size_t end = at + static_cast<std::size_t>(which.kept);
      for (std::size_t k = at; k < end; ++k) {
        const std::int64_t id = known.ids[k] - first;
        if (id < 0 || id >= width) continue;
        shard.kept.ids[at] = id;
        shard.kept.log_p[at++] = known.log_p[k];
      }
      for (; at < end; ++at) {
        shard.kept.ids[at] = width;
        shard.kept.log_p[at] = -kdk::kInfinity;
      }
    }
    first += width;
    shard.found.resize(fields * kRows);
    shard.terms.resize(3 * kRows);
    DistillArgs& rows = shard.args.rows;
    rows.batch = 1;
    rows.length = kRows;
    rows.width = width + 2;
    rows.student = rows.grad = shard.student.view();  // in place
    rows.teacher = shard.teacher.view();
    rows.kept = {which.kept, shard.kept.ids.data(), shard.kept.log_p.data(),
                 shard.kept.log_rest.data()};
    rows.labels = shard.labels.data();
    rows.unscale = shard.unscale.data();
    rows.objective = objective;
    rows.objective.vocab_size = width;
    shard.args.classes = columns;
    shard.args.merged = merged.data();
    shard.args.leads = first == columns;
    shard.args.out = shard.found.data();
    run(Phase::kStatistics, shard.args, 2);
  }

  std::vector<Losses> losses(kRows);
  for (std::size_t row : {kFirst, kLast, kSure}) {
    const Merge merge{shards, row, which.temperature};
    const auto n = static_cast<double>(columns);
    ShardStatistics of_dense;
    KeptShardStatistics of_kept;
    if (dense) {
      losses[row] = merge_dense(merge, n, which.label_smoothing, of_dense);
      scatter(of_dense, row, merged);
    } else {
      losses[row] = merge_kept(merge, n, which.label_smoothing, known.log_rest[row], of_kept);
      scatter(of_kept, row, merged);
    }
  }
  std::vector<double> value(kRows), mass(kRows), slope(kRows);
  if (which.divergence != Divergence::kForwardKL) {
    for (Shard& shard : shards) {
      shard.args.out = shard.terms.data();
      run(Phase::kTerms, shard.args, 2);
      for (std::size_t row = 0; row < kRows; ++row) {
        value[row] += shard.terms[row];
        mass[row] += shard.terms[kRows + row];
        slope[row] += shard.terms[2 * kRows + row];
      }
    }
    for (std::size_t row = 0; row < kRows; ++row) {
      merged[fields * kRows + row] = slope[row] / mass[row];
    }
  }
  for (Shard& shard : shards) run(Phase::kGradient, shard.args, 2);

  for (std::int64_t row = 0; row < kRows; ++row) {
    const auto at = static_cast<std::size_t>(row);
    const Reference& exact = want[at];
    const bool forward = which.divergence == Divergence::kForwardKL;
    long double error = 0, largest = kdk::test::kSmallest;
    bool zeros = true;
    first = 0;
    for (const Shard& shard : shards) {
      const std::int64_t width = shard.teacher.width;
      const float unscale = shard.unscale[which.student == DType::kFloat16 ? at : 0];
      for (std::int64_t j = row == kIgnored ? 0 : width; j < width + 2; ++j) {
        zeros &= kdk::to_bits(shard.student.get(row, j)) == 0;
      }
      for (std::int64_t j = 0; row != kIgnored && j < width; ++j) {
        const long double g = exact.grad[static_cast<std::size_t>(first + j)];
        const long double off =
            std::fabs(static_cast<long double>(shard.student.get(row, j)) * unscale - g);
        error = std::isnan(off) ? INFINITY : std::fmax(error, off);
        largest = std::fmax(largest, std::fabs(g));
      }
      first += width;
      if (row != kIgnored) continue;
      for (std::size_t i = 0; i < fields; ++i) zeros &= shard.found[i * kRows + at] == 0;
    }
    CHECK(zeros);
    if (row == kIgnored) continue;
    const double distill = forward ? losses[at].kl : value[at];
    raise(errors.distill, std::fabs(distill / exact.distill - 1));
    raise(errors.hard, std::fabs(losses[at].hard / exact.hard - 1));
    raise(errors.grad, error / largest);
  }
}

void test_level(Operator run) {
  for (DType student : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (std::int64_t kept : {0, 9}) {
      KeptErrors errors;
      for (int of = 0; of < 6; ++of) {
        const auto divergence = static_cast<Divergence>(of);
        // One column, a whole lane block, two tiles with a tail; and one device that has all.
        test(run, {student, {1, 64, 600}, kept, divergence, 1, 0, 1, 0}, errors);
        test(run, {student, {513, 3, 17}, kept, divergence, 2, 0.1, 1, 0}, errors);
        test(run, {student, {130}, kept, divergence, 2.5, 0, 1, 0}, errors);
        test(run, {student, {65, 62}, kept, divergence, 1.5, 0.2, -1.5, 9}, errors);
      }
      std::printf("  %s: distillation %.2g, cross-entropy %.2g, gradient %.2g\n",
                  kept == 0 ? "dense" : "kept", errors.distill, errors.hard, errors.grad);
      CHECK(errors.distill < 1e-5);
      CHECK(errors.hard < 1e-6);
      CHECK(errors.grad < (student == DType::kFloat32    ? 4e-6
                           : student == DType::kBFloat16 ? 0x1.0p-8
                                                         : 0x1.0p-11));
    }
  }
}

struct Level {
  const char* name;
  bool supported;
  Operator shard_rows;
};

const Level kLevels[] = {
#ifdef KDK_X86_LEVELS
    {"x86_64_v1", true, kdk::x86_64_v1::shard_rows},
    {"x86_64_v3", __builtin_cpu_supports("x86-64-v3") != 0, kdk::x86_64_v3::shard_rows},
    {"x86_64_v4", __builtin_cpu_supports("x86-64-v4") != 0, kdk::x86_64_v4::shard_rows},
#else
    {"baseline", true, kdk::baseline::shard_rows},
#endif
};

}  // namespace

int main() {
  for (const Level& level : kLevels) {
    std::printf("%s: %s\n", level.name, level.supported ? "tested" : "not on this processor");
    if (level.supported) test_level(level.shard_rows);
  }
  return kdk::test::checks_failed();
}
