// The ops of the row kernels in stages. Included by kd_loss.cpp, whose helpers they share.

// -> double [M, 8], or [M, 11] with by-products; local labels are in [0, V], V for another rank's.
Tensor kd_loss_stats(Tensor student_logits, Tensor teacher_logits, std::optional<Tensor> labels,
                     std::vector<int64_t> divergences, std::vector<double> numbers,
                     std::vector<double> bends, Biases biases, std::optional<Tensor> softening,
                     bool has_more) {
  const int64_t M = student_logits.size(0), V = student_logits.size(1);
  const Spec owner(divergences, numbers, V, softening, M);
  const KdSpec& spec = owner;
  const KdRowKernels& kernels = kd_row_kernels(spec.divergence);
  const Bends of(bends, biases, V);
  const BentRows student(student_logits, of.student), teacher(teacher_logits, of.teacher);
  const Labels label(labels, M, V + 1);
  check_same_shape(student_logits, teacher_logits);
  const int64_t width = sizeof(KdPart) / sizeof(double) - (has_more ? 0 : 3);
  Tensor parts = torch::stable::new_empty(student_logits, {M, width}, ScalarType::Double);
  auto* out = static_cast<double*>(parts.data_ptr());
  const auto stats = kernels.part[has_more || spec.label_smoothing != 0.0f];
  torch::stable::parallel_for(0, M, grain(V), [&](int64_t begin, int64_t end) {
    Buffers buffers(0, student, teacher);
    for (int64_t row = begin; row < end; ++row) {
      KdPart part;
      stats(student.read(row, buffers.student.data()), teacher.read(row, buffers.teacher.data()), V,
            label[row], owner.of_row(row), part);
      std::copy_n(reinterpret_cast<const double*>(&part), width, out + row * width);
    }
  });
  return parts;
}

Tensor kd_loss_sums(Tensor student_logits, Tensor teacher_logits, Tensor stats,
                    std::vector<int64_t> divergences, std::vector<double> numbers,
                    std::vector<double> bends, Biases biases, std::optional<Tensor> softening) {
  const int64_t M = student_logits.size(0), V = student_logits.size(1);
  const Spec owner(divergences, numbers, V, softening, M);
  const KdSpec& spec = owner;
  const KdRowKernels& kernels = kd_row_kernels(spec.divergence);
  const Bends of(bends, biases, V);
  const BentRows student(student_logits, of.student), teacher(teacher_logits, of.teacher);
  check_same_shape(student_logits, teacher_logits);
  check_per_row(stats, 6 * M);
  const auto* stats_rows = reinterpret_cast<const KdStats*>(floats(stats));
  const int64_t width = num_sums(spec.divergence);
  Tensor sums = torch::stable::new_empty(student_logits, {M, width}, ScalarType::Double);
  auto* out = static_cast<double*>(sums.data_ptr());
  torch::stable::parallel_for(0, M, grain(V), [&](int64_t begin, int64_t end) {
    Buffers buffers(0, student, teacher);
    for (int64_t row = begin; row < end; ++row) {
      kernels.sums(student.read(row, buffers.student.data()),
                   teacher.read(row, buffers.teacher.data()), V, owner.of_row(row), stats_rows[row],
                   out + width * row);
    }
  });
  return sums;
}

// As kd_loss_bwd of rows of `classes` classes, of which the logits are a part.
void kd_loss_write(Tensor student_logits, Tensor teacher_logits, std::optional<Tensor> labels,
                   int64_t classes, Tensor row_weights, Tensor stats,
                   std::vector<int64_t> divergences, std::vector<double> numbers,
                   std::vector<double> bends, Biases biases, std::optional<Tensor> softening,
                   Tensor dlogits) {
  const int64_t M = student_logits.size(0), V = student_logits.size(1);
  write_rows(student_logits, teacher_logits, Labels(labels, M, V + 1), row_weights, stats,
             Spec(divergences, numbers, classes, softening, M), bends, biases, dlogits);
}
